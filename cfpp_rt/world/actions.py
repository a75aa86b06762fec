"""Parsing of actions from text such as `right*20,up*10,interact`."""

import re

from cfpp_rt.errors import InputError
from cfpp_rt.world.simulator import ACTIONS

_MAX_ACTIONS = 1_000_000


def parse_actions_option(text: str | None) -> list[int]:
    """Return the actions of the option --actions. Raises InputError where it was not given."""
    if text is None:
        raise InputError("--actions must be given for the built-in world, as right*20,up*10 (none*20 waits), got none")
    return parse_actions(text)


def parse_actions(text: str) -> list[int]:
    """Return one action per frame. InputError names the part that is not `name` or `name*count`."""
    actions: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*(?:\*\s*([0-9]{1,7}))?\s*", part)
        if not match or match[1] not in ACTIONS or not 1 <= int(match[2] or 1) <= _MAX_ACTIONS:
            names = ", ".join(ACTIONS)
            raise InputError(f"actions must be names with counts as right*20,up*10, of {names}; got {part.strip()!r}")
        actions += [ACTIONS.index(match[1])] * int(match[2] or 1)
        if len(actions) > _MAX_ACTIONS:
            raise InputError(f"actions must be at most {_MAX_ACTIONS} in all, got {len(actions)} or more")
    return actions
