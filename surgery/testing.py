"""What a plugin's tests may import: the conformance kit.

    from surgery.testing import check_pass

    def test_my_pass():
        program = surgery.load("hf:DIR")
        print(check_pass(MyPass(target="attn.*"), program))

`check_pass` holds a pass to everything that the rest of surgery relies on; see `surgery.conformance`.
"""

from surgery.conformance import CHECKS, ConformanceError, ConformanceReport, Outcome, check_pass

__all__ = ["CHECKS", "ConformanceError", "ConformanceReport", "Outcome", "check_pass"]
