"""The command line: the only home of click. Commands import what they need when they run."""
