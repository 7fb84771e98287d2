"""Training: the step, its optimizer, the mesh, checkpoints and metrics."""

from sigattn import extras

extras.require("train")
