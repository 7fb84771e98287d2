"""Uses of a trained model: generating texts, transcribing and scoring."""

from sigattn import extras

extras.require("train")
