"""What is left in a model, and interrupts at any line."""

from __future__ import annotations

import dis
import functools
import sys


def attributes(model):
    """Everything that the modules keep, by identity; of mappings, what is in them."""
    return [
        (name, key, [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "executions"
    ]


@functools.cache
def seamless(code):
    """The lines of a function on which a ``with`` begins, and ends, or a ``try`` begins.

    There, a tracer interrupts between leaving a block and giving its lock back, or in an instruction that does nothing
    and has no handler, which no signal can.
    """
    bound = ("BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL", "NOP")
    lines, found, line = dict(dis.findlinestarts(code)), set(), None
    for each in dis.get_instructions(code):
        line = lines.get(each.offset, line)
        if each.opname in bound:
            found.add(line)
    return found


def interrupted(action, after, modules):
    """Do something, and raise KeyboardInterrupt after so many lines of these modules. Whether it came to its end."""
    count, files = after, {module.__file__ for module in modules}

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and frame.f_lineno not in seamless(frame.f_code):
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
