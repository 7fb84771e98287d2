"""Sources of examples, and the pipeline that makes batches of them."""

from sigattn import extras

extras.require("train")
