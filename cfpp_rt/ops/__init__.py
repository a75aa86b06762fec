"""The custom ops: one module and one public function per op, registered with torch.library."""

from cfpp_rt.ops._library import backends as backends
