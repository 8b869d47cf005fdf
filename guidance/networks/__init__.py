"""The networks of guidance: denoisers, autoencoders, and CLIPs that see noise."""
