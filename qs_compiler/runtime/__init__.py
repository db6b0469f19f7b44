"""What outlives one forward: the step tracker, the choice of phase, packed weights and residual caches."""
