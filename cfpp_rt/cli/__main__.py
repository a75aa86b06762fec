"""`python -m cfpp_rt.cli`: the same as the `cfpp` command."""

from cfpp_rt.cli.main import main

raise SystemExit(main())
