"""Where examples come from, and how they become batches."""

from sigattn import extras

extras.require("train")
