"""Evaluation: what a press costs in quality, against controls, from the compressed cache itself.

`quantpress eval` (`quantpress.cli.evaluate`) runs all of it.

arms.py              what is compared, the controls among them
uniform_pages.py     plain integers and KIVI's scheme, really packed
equal_bytes.py       arms that take the same bytes: more tokens, or more bits
documents.py         contexts and continuations from a book
reference.py         the uncompressed model's distributions and queries
teacher_forcing.py   a continuation fed through a compressed cache
fidelity.py          divergence, agreement and likelihood, token by token
attention_error.py   attention over the compressed context, per layer and head
cases.py             a question about a context, and what an answer is worth
needle_tasks.py, word_tasks.py   RULER's kinds of task, made from a seed
task_runs.py         the cases asked over every arm
statistics.py        bootstrap over documents, paired differences, McNemar's test
suites.py, runner.py, records.py   how much is measured; resumable runs; JSON lines
summary.py, markdown.py, figures.py   rows with intervals, tables, pictures
kvpress_evaluation.py, lm_eval_model.py   other projects' benchmarks over our presses
"""
