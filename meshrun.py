"""`from meshrun import log_step, should_stop, checkpoint_dir`: what a script of your own may use, and needs not."""

from workloads.script.steps import checkpoint_dir, log_step, should_stop

__all__ = ["checkpoint_dir", "log_step", "should_stop"]
