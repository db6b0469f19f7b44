"""Make Triton 3.6's interpreter compute what the compiler would: bf16 products, bf16 rounding, scalar loop bounds."""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def apply() -> None:
    """Patch the interpreter of this process."""
    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        # numpy 2 makes no index of a one-element array
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle):
        """bf16 lives as uint16 bit patterns, which a product would take for numbers."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patched_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def patched_cast(self, source, dtype):
        """fp32 to bf16 rounds to nearest even instead of cutting off."""
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(source.data), np.uint32(0x7FC0), rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded.reshape(np.shape(source.data)), tl.bfloat16)

    interpreter._patch_lang_tensor = patched_tensor
    builder.create_dot, builder.cast_impl = patched_dot, patched_cast
