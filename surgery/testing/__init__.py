"""The conformance kit: what the tests of a plugin run.

    check_pass         every check of a pass on one program, see surgery.testing.passes
    check_objective    options, data, loss, gradient, metrics and a short training
    check_loader       a reference of the plugin's scheme: capture, weights, saving
    check_weight_op    an op with a weight: found as a site, and LoRA on it
    text_classifier    a tiny BERT with a tokenizer, written into a directory, to check these on

Each returns a ConformanceReport, and raises ConformanceError at the first failure.
"""

from __future__ import annotations

from surgery.testing.case import Case, ConformanceError, Skip
from surgery.testing.loaders import check_loader
from surgery.testing.objectives import check_objective
from surgery.testing.passes import CHECKS, check_pass
from surgery.testing.report import ConformanceReport, Outcome
from surgery.testing.tiny import text_classifier
from surgery.testing.weight_ops import check_weight_op

__all__ = [
    "CHECKS",
    "Case",
    "ConformanceError",
    "ConformanceReport",
    "Outcome",
    "Skip",
    "check_loader",
    "check_objective",
    "check_pass",
    "check_weight_op",
    "text_classifier",
]
