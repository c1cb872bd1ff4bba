"""Starts ranks, watches them, starts them again, and joins ranks that another launcher started."""
