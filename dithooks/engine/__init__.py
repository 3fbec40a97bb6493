"""The runtime of a cached range, from hook to residual; private. In reading order:

1. ``hooks``: on the transformer (or a method of it, ``watched_method``), on both ends of the range and, until the
   wiring is known, on every block.
2. ``stand_in``: in a block's place in its list; runs the block on a computed step, passes it over on a reused one.
3. ``attachment``: puts both on and takes them off (``block_range``: which blocks; ``range_settings``: by which config;
   ``trunk_watch``: on which of several stacks, by their first calls), under one lock (``model_lock``) and to the end
   (``completion``); ``compiled_code``: what stays out of it, ``compiled_calls``: what waits for what there.
4. ``range_cache``: what hooks and stand-ins call, from the transformer's call to its return.
5. ``call``: one call of the transformer, a stage and a mode (``active_calls``: those under way in all threads).
6. ``clock``: the step of a call, by an open scope (``sessions``, ``steps_loop``, ``requests``), by a count or a
   scheduler, or by a timestep (``timestep_argument``, ``step_source``).
7. ``arguments``, ``branches``: what a call is given, and which of its step's calls it therefore is.
8. ``decider``: asks the policy, and commits calls that are over; keeps the runs and their branches (``run``).
9. ``residual``, ``additions``, ``anchor``: Δ taken and added; less what the model adds; kept, and the weighted sum Δ̂
   (``finite_check``: unless it is not finite); ``output_correction``: the output, corrected by earlier ones.
   ``part_decider``: the same where parts of a guided batch have weights of their own (``batch_parts``).
10. ``change_metrics``, ``weights_version``, ``rank_consensus``: what a decision may depend on besides.
11. ``verification``: the first residual, tested on its own call (``noise_probe``: with noise).
12. ``replay``: a call made again, with ``argument_copies``; ``output_comparison``: of what the two leave behind.
13. ``output_cache``: in place of a range's, where the output of the whole transformer is forecast; called by its
    stand-in (``model_stand_in``), which is wherever the transformer was held (``module_places``), and makes outputs
    of its form (``output_form``). ``output_attachment`` puts it there; ``payloads`` chooses between the two.
    ``held_difference`` makes the output of one branch of guidance of another's, where a plan computes that one alone.
14. ``row``: whose the rows of a batch are, if they belong to several requests; ``row_states`` decides them one by one,
    ``row_batch`` runs the blocks on some of them. ``row_survey`` finds out what in a call is whose, and
    ``batch_dimensions`` takes rows out of it. ``row_part_decider``: a request's rows as parts of a guided batch.
    ``output_rows``: the same where the whole transformer is left out.
    ``sample_decider`` takes the samples of a plain batch for such rows.
15. ``protocols``: what the engine asks of other libraries; ``dithooks.integrations`` answers.

``docs/design.md`` walks through one computed and one reused step, with a link to each line.
"""
