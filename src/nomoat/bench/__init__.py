"""How fast is this machine, and how much of that does the engine use? `nomoat bench`."""
