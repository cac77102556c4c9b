"""The command `pixtral`: one file a command, named like it. The only package that writes to the terminal."""
