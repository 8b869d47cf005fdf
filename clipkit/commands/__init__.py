"""Commands, grouped by subject. Each imports its implementation when it runs, so that --help is fast."""
