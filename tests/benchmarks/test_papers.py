# SPDX-License-Identifier: Apache-2.0
"""The search for a learning rate, and what the results say."""

import math

import pytest

import contenders
import papers
import quality
import readme
import results

RESULTS = {
  name: results.load(name)['contenders'] for name in ('papers', 'papers_more')
}


def test_the_search_ends_between_worse_rates():
  """Wherever it begins; each rate is tried once."""
  for best in (-2, 0, 3):
    tried = []

    def loss_at(step, best=best, tried=tried):
      tried.append(step)
      return (step - best) ** 2

    found = papers.search(loss_at)
    assert min(found, key=lambda step: found[step]) == best
    assert {best - 1, best + 1} <= set(found)
    assert len(tried) == len(set(tried)) == len(found)


def test_the_search_leaves_rates_that_diverge():
  found = papers.search(lambda step: math.inf if step > -2 else -step)
  assert min(found, key=lambda step: found[step]) == -2


def test_the_search_gives_up():
  """And the row says so: it is not bracketed."""
  assert len(papers.search(lambda step: -step)) == papers.MOST


def test_rates_are_three_a_decade():
  paper = contenders.PAPERS['optax.adamw']
  rates = [papers.rate_at(paper, step) for step in range(4)]
  assert rates == [0.002, 0.00431, 0.00928, 0.02]


def test_every_optimizer_was_trained():
  found = set().union(*RESULTS.values())
  assert found == set(contenders.PAPERS)
  assert set(readme.WHEN) <= found


@pytest.mark.parametrize('name', RESULTS)
def test_rows_are_what_they_say(name):
  rows = RESULTS[name]
  losses = [tuple(row['losses']) for row in rows.values()]
  assert len(losses) == len(set(losses)), 'no row is another one'
  for contender, row in rows.items():
    paper = contenders.PAPERS[contender]
    assert row['bytes'] == papers.state_bytes(paper, quality.CONFIG)
    assert row['bracketed'], 'the best rate has worse ones on both sides'
    assert len(row['losses']) == 5
    searched = {float(rate): loss for rate, loss in row['search'].items()}
    grid = range(-papers.MOST, papers.MOST)
    # What the command would try, from where the row begins.
    assert set(searched) <= {papers.rate_at(paper, step) for step in grid}
    assert paper.learning_rate in searched
    assert (
      min(searched, key=lambda rate: searched[rate]) == row['learning_rate']
    )
    gap = quality.paired_gap(row['losses'], rows['optax.adamw']['losses'])
    assert row['gap'] == gap.mean
    assert row['standard_error'] == gap.standard_error


def test_rows_of_another_machine_are_no_rows_of_this_one():
  """The committed run is of another text."""
  wanted = papers.told(quality.CONFIG, {}, 5)
  before = papers.earlier(results.FOLDER, wanted, only=False)
  assert before in (results.load('papers'), {'contenders': {}})
  other = wanted | {'seeds': [7]}
  assert papers.earlier(results.FOLDER, other, only=False) == {'contenders': {}}
  with pytest.raises(ValueError, match='another seeds.*`--out`'):
    papers.earlier(results.FOLDER, other, only=True)


def test_what_the_page_says_of_claims():
  """kind: claim, of benchmarks/README.md."""
  rows = RESULTS['papers']

  def beyond(name, times=2):
    return rows[name]['gap'] / (times * rows[name]['standard_error'])

  assert beyond('adamw_snsm') < -1  # below AdamW after as many steps
  assert beyond('adamw_snsm, half the steps') > 10  # far above after half
  assert rows['grass']['gap'] > 5 * rows['galore']['gap'] > 0
  for name in (
    'adamw_sn',
    'adam_mini',
    'galore',
    'came',
    'apollo_mini',
    'lomo',
  ):
    assert beyond(name) > 1  # above AdamW
  assert abs(beyond('apollo')) < 1
  assert rows['adalomo']['gap'] < rows['lomo']['gap'] / 5
