"""Global knowledge distillation (GKD): the whole student learns to predict what the whole teacher predicts."""

from puzzle.kd.loop import Distillation, DivergedError, distillation_loss

__all__ = ["Distillation", "DivergedError", "distillation_loss"]
