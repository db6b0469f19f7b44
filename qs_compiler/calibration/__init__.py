if __name__ != "qs_compiler.calibration":
    raise ImportError("import qs_compiler.calibration: the top-level calibration/ is a link for readers")
