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


def interrupted(action, after, modules):
    """Do something, and raise KeyboardInterrupt after so many lines of these modules. Whether it came to its end."""
    count, files = after, {module.__file__ for module in modules}

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename not in files:
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
