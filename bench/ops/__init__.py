"""One benchmark per op of `cfpp_rt.ops`."""
