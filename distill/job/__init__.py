"""One prepared run: its phases in order, how it resumes, what it leaves."""
