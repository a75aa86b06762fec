"""The built-in world: a small arena with an agent, a crate, a gate and a coin; its simulator, codec and student."""
