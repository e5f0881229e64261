"""What goes wrong in a run, told from its curves while it runs or afterwards, each time with what to do about it."""
