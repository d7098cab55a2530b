"""Faster ways to run the same networks: an execution plan with hand-written derivatives, and its kernels."""
