"""Many runs of one recipe with other settings, proposed by a sampler and judged by a scheduler of Ray Tune, on one teacher's signals."""
