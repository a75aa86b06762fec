"""Checks that a parsed network is the graph of the contract: one attention per site, every cache updated in place.

TensorRT parses and builds networks that compute something else, or the same thing slowly, without an error. Everything
that can be known before the build is checked here; each fault is one line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec, TensorSpec
from cfpp_rt.export.trt.library import Library
from cfpp_rt.export.trt.parser import Network, inputs_of, layers
from cfpp_rt.io.text import name_list

Port = tuple[tuple[int, ...], str]  # shape and dtype, e.g. ((1, 12, 1560, 128), "bfloat16")

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3",
}
# A walk from an attention's keys back to the update of their cache may cross views and scales, and ends at these.
_WALK_ENDS = {"KV_CACHE_UPDATE", "ATTENTION_OUTPUT", "MATRIX_MULTIPLY", "CONVOLUTION"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One self-attention.

    key_cache, value_cache: the caches that it reads.
    validity: the network inputs that determine the valid part of them.
    decomposable: True if TensorRT may run it as separate kernels.
    """

    name: str
    key_cache: str
    value_cache: str
    validity: str
    decomposable: bool


@dataclasses.dataclass(frozen=True)
class NetworkReport:
    """The facts that `check_network` established.

    layers: number of layers of the network.
    sites: the self-attentions.
    cross_attentions: number of attentions that read no cache.
    float8_linears: number of products of two operands in 8 bits.
    notes: changes made after parsing.
    """

    layers: int
    sites: tuple[Site, ...]
    cross_attentions: int
    float8_linears: int
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    notes: tuple[str, ...]


def check_network(library: Library, network: Network, spec: GraphSpec) -> NetworkReport:
    """Check a network against the contract of its graph; return the facts.

    Raises InputError naming the first three faults and how many more there are.
    """
    facts = _Facts(library, network.definition)
    faults = [*_port_faults("input", facts.inputs, spec.inputs), *_port_faults("output", facts.outputs, spec.outputs)]
    faults += facts.update_faults(spec.aliases)
    sites, site_faults = facts.sites()
    faults += site_faults
    attentions = len(facts.attentions)
    if attentions != network.source_attentions:
        faults.append(f"the graph has {network.source_attentions} Attention nodes, the network {attentions}")
    if facts.float8_products != network.source_float8:
        faults.append(
            f"the graph has {network.source_float8} products of operands in 8 bits, the network {facts.float8_products}"
        )
    if facts.softmaxes:
        faults.append(f"attention is decomposed: softmax layer {facts.softmaxes[0]}; export it as one Attention node")
    read = {cache for site in sites for cache in (site.key_cache, site.value_cache)}
    # The last layer of a refresh stops at its keys and values; every other cache that is written is read.
    caches = list(spec.aliases.values())
    if spec.name == "refresh":
        last = caches[-1].rpartition(".")[2]
        caches = [cache for cache in caches if cache.rpartition(".")[2] != last]
    unread = [cache for cache in caches if cache not in read]
    if unread and not site_faults:
        faults.append(f"no attention reads cache {name_list(unread)}")
    unused = [name for name in facts.inputs if name not in facts.needed]
    if unused:
        faults.append(f"input {name_list(unused)} reaches no output: the parser dropped it or nothing uses it")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"the network is not the graph of the contract: {'; '.join(faults[:3])}{more}")
    return NetworkReport(
        network.definition.num_layers,
        tuple(sites),
        attentions - len(sites),
        facts.float8_products,
        facts.inputs,
        facts.outputs,
        network.notes,
    )


class _Facts:
    """The network as maps: the layer behind each tensor, and the tensors that the outputs depend on."""

    def __init__(self, library: Library, definition: Any):
        self.inputs = {t.name: _port(t) for t in (definition.get_input(i) for i in range(definition.num_inputs))}
        self.outputs = {t.name: _port(t) for t in (definition.get_output(i) for i in range(definition.num_outputs))}
        self.makers = {
            layer.get_output(i).name: layer for layer in layers(library, definition) for i in range(layer.num_outputs)
        }
        self.updates = list(layers(library, definition, "KV_CACHE_UPDATE"))
        self.attentions = list(layers(library, definition, "ATTENTION_INPUT"))
        self.softmaxes = [layer.name for layer in layers(library, definition, "SOFTMAX")]
        self.float8_products = sum(
            all(self._from_float8(layer.get_input(i)) for i in range(2))
            for layer in layers(library, definition, "MATRIX_MULTIPLY")
        )
        self.needed = self.behind(self.outputs, ends=set())

    def behind(self, names: Any, ends: set[str]) -> set[str]:
        """Return all tensors that these depend on, themselves included. ends: kinds of layers that end the walk."""
        seen: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            maker = self.makers.get(name)
            if maker is not None and maker.type.name not in ends:
                waiting += [tensor.name for tensor in inputs_of(maker) if tensor is not None]
        return seen

    def _from_float8(self, tensor: Any) -> bool:
        """Return True if a tensor, apart from views, is the output of a DequantizeLinear of one in 8 bits."""
        maker = self.makers.get(tensor.name)
        while maker is not None and maker.type.name == "SHUFFLE":
            maker = self.makers.get(maker.get_input(0).name)
        return maker is not None and maker.type.name == "DEQUANTIZE" and maker.get_input(0).dtype.name == "FP8"

    def update_faults(self, aliases: Mapping[str, str]) -> list[str]:
        """Return the faults of the cache updates. aliases: `GraphSpec.aliases`."""
        faults = []
        updated = [update.get_input(0).name for update in self.updates]
        for update in self.updates:
            cache, output = update.get_input(0), update.get_output(0)
            if update.cache_mode.name != "LINEAR":
                faults.append(f"update {update.name} is {update.cache_mode.name.lower()}, must be linear")
            if not cache.is_network_input:
                faults.append(f"update {update.name} must write a network input, it writes {cache.name}")
            if not output.is_network_output:
                faults.append(f"updated cache {output.name} must be a network output")
            elif aliases.get(output.name) != cache.name:
                wanted = aliases.get(output.name, "no cache")
                faults.append(f"output {output.name} must be {wanted} updated in place, it is {cache.name}")
        twice = sorted({cache for cache in updated if updated.count(cache) > 1})
        if twice:
            faults.append(f"cache {name_list(twice)} is updated twice: one engine may update a cache once")
        missing = [output for output, cache in aliases.items() if cache not in updated]
        if missing:
            faults.append(f"output {name_list(missing)} must be a cache updated in place: it has no KV cache update")
        return faults

    def sites(self) -> tuple[list[Site], list[str]]:
        """Return the self-attentions and their faults."""
        sites, faults = [], []
        owner = {update.get_output(0).name: update.get_input(0).name for update in self.updates}
        for layer in self.attentions:
            keys, values = (
                sorted({owner[name] for name in self.behind([layer.get_input(i).name], _WALK_ENDS) if name in owner})
                for i in (1, 2)
            )
            if not keys and not values:
                continue
            name = layer.name.removesuffix("_AttentionInput")
            if len(keys) != 1 or len(values) != 1 or keys == values:
                faults.append(
                    f"attention {name} must read one cache of keys and one of values, it reads"
                    f" {name_list(keys) or 'none'} and {name_list(values) or 'none'}"
                )
                continue
            validity = self._validity(layer)
            if not validity:
                faults.append(f"attention {name} sees the whole cache: it has neither valid length nor mask")
            sites.append(Site(name, keys[0], values[0], validity, layer.attention.decomposable))
        for cache in sorted({site.key_cache for site in sites}):
            sharing = [site.name for site in sites if site.key_cache == cache]
            if len(sharing) > 1:
                faults.append(f"attentions {name_list(sharing)} share cache {cache}: that crashes the builder")
        return sites, faults

    def _validity(self, layer: Any) -> str:
        """Return the network inputs that the attention's lengths or mask depend on."""
        extra = [tensor.name for tensor in inputs_of(layer)[3:] if tensor is not None]
        return ", ".join(sorted(self.behind(extra, ends=set()) & self.inputs.keys()))


def _port(tensor: Any) -> Port:
    return tuple(tensor.shape), _DTYPES.get(tensor.dtype.name, tensor.dtype.name)


def _port_faults(kind: str, found: Mapping[str, Port], wanted: Sequence[TensorSpec]) -> list[str]:
    faults = [f"{kind} {tensor.name} is missing" for tensor in wanted if tensor.name not in found]
    faults += [f"{kind} {name} is not in the contract" for name in found if name not in {t.name for t in wanted}]
    for tensor in wanted:
        shape, dtype = found.get(tensor.name, (tensor.shape, tensor.dtype))
        if (shape, dtype) != (tensor.shape, tensor.dtype):
            faults.append(
                f"{kind} {tensor.name} must be {tensor.dtype} {list(tensor.shape)}, got {dtype} {list(shape)}"
            )
    return faults
