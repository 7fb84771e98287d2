"""What a trained model is used for: texts, transcripts, scores."""

from sigattn import extras

extras.require("train")
