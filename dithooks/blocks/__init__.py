"""Where: the lists of blocks of a model, and how their streams are wired. In reading order:

1. ``trunk``: from one observed call, the order in which blocks run, and the wiring of a range of them.
2. ``observation``: one computed call of the blocks as hooks (``tap``) saw it, and which tensor went where
   (``data_flow``: what later ones are made of; ``held_outputs``: which were still held later, where the call cannot be
   repeated).
3. ``stream_matching``: which argument each output of a block carries on (``pattern``: the six usual ways), and which
   parts of a container it leaves as they are (``passed_parts``).
4. ``wiring``: the streams followed from a range's first block to its last.
5. ``stream_transforms``: what a model does to its streams between two blocks (join, slice, swap batch and tokens).
6. ``block_io``: read a block's streams from its call, and build an output of its form from streams (``containers``:
   what tuples, dicts and dataclasses hold).
7. ``model_kinds``: U-Nets and ControlNets, which are no trunks.
8. ``block_lists``: a block's place in a list, a list, and the lists of one transformer.
9. ``discovery``: find those lists (``trunk_heuristics``), or follow a user's path to them (``module_paths``).
10. ``adapter``: what a user declares about blocks that observation cannot resolve.
11. ``registry``: such declarations by class name, and the choice between declared, named and found blocks.
12. ``whole_models``: transformers that are cached as wholes, also those without lists, and U-Nets.
13. ``cache_target``: what holds them, for type checkers.
"""
