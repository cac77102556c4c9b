"""One file a command: it reads options, calls one function, prints."""
