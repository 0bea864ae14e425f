"""How fast the code is, against the plainest correct way: `python -m speed.benchmark`."""
