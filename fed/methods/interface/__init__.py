"""The interface of a method: registration, options, client rule, calibration, shared checks."""
