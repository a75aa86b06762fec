"""Code that every runtime of a student shares: frame ring, random numbers, rotary angles, schedule, cameras."""
