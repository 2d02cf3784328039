"""The communicators, one file or folder each. selection/opening.py has their order."""
