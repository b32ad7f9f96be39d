"""Side-by-side measurements; ``python -m sdumc.bench [part ...]`` prints tables."""
