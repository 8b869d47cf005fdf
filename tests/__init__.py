"""A package, so that no other one called tests, which some distributions install, is found in its place."""
