"""What this machine is, has and does at the moment: packages, clocks, heat, memory, energy."""
