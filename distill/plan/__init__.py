"""Recipe and ranks to a plan: placement, shares, cost, memory. Imports no torch."""
