"""How the package stands up to what goes wrong: faults, bad input, long runs."""
