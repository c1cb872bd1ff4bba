"""DeepSpeed behind one door. No other package names it."""
