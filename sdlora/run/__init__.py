"""A run from start to finish; the only place that knows the order of the stages."""
