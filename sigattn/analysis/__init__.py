"""What a run did and why: telemetry, pictures, reports, theory."""

from sigattn import extras

extras.require("train")
