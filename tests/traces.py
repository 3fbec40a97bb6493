"""What is left in a model, and interrupts at any line."""

from __future__ import annotations

import sys


def attributes(model):
    """Everything that the modules keep, by identity; of mappings, what is in them."""
    return [
        (name, key, [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "executions"
    ]


def interrupted(action, after, files):
    """Do something, and raise KeyboardInterrupt after so many lines of these files. Whether it came to its end."""
    count = after

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            count -= 1
            if count == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
