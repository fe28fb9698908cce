'use strict';
// What answers to a hand on the drawn page: section links, the charts' values at a step, the token view. Text from a
// run only ever becomes text nodes.

const DATA = JSON.parse(document.getElementById('data').textContent);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const unknown = value => value === null || value === undefined;
const small = value => value !== 0 && Math.abs(value) < 1e-3;
const fixed = value => (small(value) ? value.toExponential(1) : value.toFixed(3));
const probability = p => (unknown(p) ? '–' : fixed(p));
const nats = d => (unknown(d) ? '∞' : fixed(d));
function number(value) {
  if (unknown(value)) return '–';
  if (small(value)) return value.toExponential(2);
  const rounded = Math.abs(value) >= 1e5 ? Math.round(value) : Number(value.toPrecision(4));
  return rounded.toLocaleString('en', {maximumFractionDigits: 6});
}

for (const section of document.querySelectorAll('main section')) {
  const link = element('a', {href: '#' + section.id}, section.querySelector('h2').textContent);
  document.getElementById('links').append(link);
}
for (const hidden of document.querySelectorAll('.js')) hidden.classList.remove('js');

// ---- charts: the values at a step

function nearest(steps, step) {
  const above = steps.findIndex(s => s >= step);
  if (above < 1) return above === 0 ? 0 : steps.length - 1;
  return step - steps[above - 1] <= steps[above] - step ? above - 1 : above;
}

const charts = [];
const showAll = step => charts.forEach(chart => chart.show(step));

class Chart {
  constructor(figure) {
    this.lines = figure.dataset.chart ? DATA.charts[figure.dataset.chart] : DATA.accuracy;
    for (const line of this.lines) line.steps = line.points.map(point => point[0]);
    this.steps = [...new Set(this.lines.flatMap(line => line.steps))].sort((a, b) => a - b);
    this.end = this.steps.length - 1;
    this.at = figure.querySelector('.at');
    this.cells = figure.querySelectorAll('.cell b');
    this.drawings = [...figure.querySelectorAll('.plot')].map(plot => this.drawing(plot));
    this.show(null);
  }

  // The axes of one of the chart's drawings, linear and mostly also logarithmic, and what moves in it.
  drawing(plot) {
    const svg = plot.firstElementChild;
    const [[first, last], [low, high]] = [svg.dataset.x, svg.dataset.y].map(pair => pair.split(' ').map(Number));
    for (const kind of ['pointermove', 'pointerdown']) {
      svg.addEventListener(kind, event => {
        const at = svg.querySelector('.axis').getBoundingClientRect();
        this.go(nearest(this.steps, first + (event.clientX - at.left) / at.width * (last - first)));
      });
    }
    svg.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') showAll(null); });
    svg.addEventListener('keydown', event => {
      const here = this.step === null ? this.end : nearest(this.steps, this.step);
      const far = Math.max(1, Math.round(this.end / 10));
      const to = {
        ArrowLeft: here - 1, ArrowRight: here + 1, ArrowDown: here - 1, ArrowUp: here + 1,
        PageDown: here - far, PageUp: here + far, Home: 0, End: this.end, Escape: null,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      if (to === null) showAll(null); else this.go(to);
    });
    const height = plot.classList.contains('log') ? Math.log10 : v => v;
    const x = step => `${100 * (step - first) / (last - first)}%`;
    const y = value => `${100 * (high - height(value)) / (high - low)}%`;
    return {svg, x, y, cursor: svg.querySelector('.cursor'), dots: svg.querySelectorAll('.dot')};
  }

  go(index) { showAll(this.steps[Math.min(this.end, Math.max(0, index))]); }

  // The values at `step`, of which lines that have none near it say so; for null each line's last.
  show(step) {
    this.step = step;
    const wanted = step ?? this.steps[this.end];
    const gap = step === null ? Infinity : Math.max(1, (this.steps[this.end] - this.steps[0]) / 100);
    const together = step !== null || this.lines.every(line => line.steps.includes(wanted));
    let title = together ? `step ${number(wanted)}` : 'last steps';
    const marked = [];
    const said = this.lines.map(({run, label, steps, points, errors, names}, i) => {
      const near = nearest(steps, wanted);
      const [at, value] = points[near];
      const there = errors || Math.abs(at - wanted) <= gap;
      let text = there ? number(value) : '–';
      if (errors) {
        const interval = errors[near].some(unknown) ? '' : ` (${errors[near].map(v => v.toFixed(1)).join(' to ')})`;
        text = value.toFixed(1) + interval;
        if (this.lines.length === 1) title = names[near];
      }
      this.cells[i].textContent = text;
      marked.push(there && step !== null && !unknown(value) ? [at, value] : null);
      return `${DATA.runs.length > 1 ? `${DATA.runs[run]} ` : ''}${label} ${text}`;
    });
    this.at.textContent = title;
    for (const {svg, x, y, cursor, dots} of this.drawings) {
      cursor.toggleAttribute('hidden', step === null);
      for (const end of ['x1', 'x2']) cursor.setAttribute(end, x(wanted));
      dots.forEach((dot, i) => {
        dot.toggleAttribute('hidden', !marked[i]);
        if (marked[i]) { dot.setAttribute('cx', x(marked[i][0])); dot.setAttribute('cy', y(marked[i][1])); }
      });
      svg.setAttribute('aria-valuenow', wanted);
      svg.setAttribute('aria-valuetext', `${title}: ${said.join(', ')}`);
    }
  }
}

// ---- token view

const STRONG = 0.5;  // nats at which the colour is full
const NOTABLE = 0.05;  // nats from which it is a disagreement
const LINE = 60;  // characters, about, in a line of the text beside the card
const FEW_LINES = 8;  // up to which the card lies below the text: beside so few, it would leave a hole under them
const VERDICT = {less: 'The teacher likes it less', more: 'The teacher likes it more', same: 'Both like it alike'};
const strength = d => (unknown(d) ? 1 : Math.sqrt(Math.min(1, Math.max(0, d) / STRONG)));
const notable = token => (token[4] ?? Infinity) >= NOTABLE;
const visible = text =>
  (text ?? '').replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/ /g, '␣') || '(no text of its own)';

// Whether the teacher gives the token less or more than the student; within 5 % of each other it is neither.
function leaning([, , student, teacher]) {
  if (unknown(student) || unknown(teacher)) return 'same';
  const ratio = Math.log((teacher + 1e-12) / (student + 1e-12));
  return ratio < -0.05 ? 'less' : ratio > 0.05 ? 'more' : 'same';
}

function fill(meter, p) {
  meter.firstElementChild.style.width = `${100 * Math.min(1, Math.max(0, p ?? 0))}%`;
  return meter;
}

class TokenView {
  constructor(root) {
    this.find = selector => root.querySelector(selector);
    this.pick = this.find('#pick-sample');
    this.text = this.find('.tokens');
    const on = (selector, kind, action) => this.find(selector).addEventListener(kind, action);
    const onToken = (selector, kind, action) => on(selector, kind, event => {
      const token = event.target.closest('[data-i]');
      if (token) action(Number(token.dataset.i));
    });
    on('#pick-sample', 'change', () => this.open());
    on('#previous', 'click', () => this.turn(-1));
    on('#following', 'click', () => this.turn(1));
    on('#disagreement', 'click', () => this.disagreement());
    onToken('.tokens', 'focusin', i => this.choose(i, false));
    for (const selector of ['.tokens', '.strip']) {
      onToken(selector, 'pointerover', i => this.show(i));
      onToken(selector, 'click', i => this.choose(i, true));
      on(selector, 'pointerleave', () => { if (this.chosen !== null) this.show(this.chosen); });
    }
    on('.tokens', 'keydown', event => this.key(event));
    this.pick.selectedIndex = Math.max(0, DATA.samples.findIndex(sample => sample.view.length));
    this.open();
  }

  turn(by) {
    const count = this.pick.options.length;
    this.pick.selectedIndex = (this.pick.selectedIndex + by + count) % count;
    this.open();
  }

  open() {
    const {run, step, tokens, of, view, truncated, source, problem, rollout} = DATA.samples[this.pick.value];
    Object.assign(this, {view, of, chosen: null, shown: null});
    const facts = [
      DATA.runs.length > 1 && DATA.runs[run], `step ${step ?? '?'}`, tokens !== null && `${number(tokens)} tokens`,
      of > view.length && `the first ${number(view.length)} shown`,
      truncated ? 'cut off at the longest length' : 'ended by itself', source,
    ];
    this.find('.about .quiet').textContent = facts.filter(Boolean).join(' · ');
    this.find('.problem').textContent = problem;
    const known = view.length > 0;
    for (const part of ['.scale', '.strip', '.card']) this.find(part).hidden = !known;
    const written = known ? view.map(token => token[0] ?? '').join('') : rollout;
    const lines = written.split('\n').reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / LINE)), 0);
    this.find('.split').classList.toggle('wide', !known || lines <= FEW_LINES);
    this.text.setAttribute('role', known ? 'listbox' : 'group');
    this.tokens = view.map((token, i) => this.span(token, i));
    this.text.replaceChildren(...(known ? this.tokens : [rollout]));
    this.text.scrollTop = 0;
    this.find('.strip').replaceChildren(...view.map((token, i) =>
      element('i', {class: leaning(token), 'data-i': i, style: `height:${Math.max(4, 100 * strength(token[4]))}%`})));
    if (known) this.choose(Math.max(0, view.findIndex(notable)), false);
  }

  span(token, i) {
    const [text, , student, teacher, divergence] = token;
    const kind = leaning(token);
    const both = `student ${probability(student)}, teacher ${probability(teacher)}`;
    return element('span', {
      class: `tok ${kind}${text === '' ? ' empty' : ''}`, style: `--a:${strength(divergence).toFixed(3)}`,
      'data-i': i, tabindex: -1, role: 'option', 'aria-selected': 'false',
      'aria-label': `${visible(text)}: ${both}, divergence ${nats(divergence)} nats. ${VERDICT[kind]}.`,
    }, text === '' ? '·' : (text ?? '').replace(/\n/g, '↵\n'));  // the sign, and then the line breaks
  }

  choose(i, focus) {
    const select = (token, is) => { token.tabIndex = is ? 0 : -1; token.setAttribute('aria-selected', is); };
    if (this.chosen !== null) select(this.tokens[this.chosen], false);
    this.chosen = i;
    select(this.tokens[i], true);
    if (focus) {
      this.tokens[i].focus({preventScroll: true});
      this.tokens[i].scrollIntoView({block: 'nearest'});
    }
    this.show(i);
  }

  disagreement() {
    const next = this.view.findIndex((token, i) => i > this.chosen && notable(token));
    const i = next < 0 ? this.view.findIndex(notable) : next;
    if (i >= 0) this.choose(i, true);
  }

  key(event) {
    if (this.chosen === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const end = this.tokens.length - 1;
    const to = {
      ArrowRight: () => this.chosen + 1, ArrowLeft: () => this.chosen - 1, Home: () => 0, End: () => end,
      ArrowDown: () => this.row(1), ArrowUp: () => this.row(-1),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.choose(Math.min(end, Math.max(0, to())), true);
  }

  // The token above (-1) or below (1) the chosen one.
  row(direction) {
    const boxes = this.tokens.map(token => token.getBoundingClientRect());
    const here = boxes[this.chosen];
    const down = box => direction * (box.top - here.top);
    const next = Math.min(...boxes.map(down).filter(distance => distance > 4));
    const off = i => Math.abs(boxes[i].left + boxes[i].width / 2 - here.left - here.width / 2);
    const row = [...boxes.keys()].filter(i => Math.abs(down(boxes[i]) - next) <= 4);
    return row.reduce((best, i) => (off(i) < off(best) ? i : best), row[0] ?? this.chosen);
  }

  // The card of token `i`.
  show(i) {
    if (this.shown !== null) this.tokens[this.shown].classList.remove('shown');
    this.shown = i;
    this.tokens[i].classList.add('shown');
    const [text, id, student, teacher, divergence, alternatives, dominant] = this.view[i];
    const kind = leaning(this.view[i]);
    const write = (selector, words) => { this.find(selector).textContent = words; };
    write('.place span', `token ${i + 1} of ${number(this.of)}`);
    write('.place span + span', `id ${id ?? '?'}`);
    write('.word', visible(text));
    write('.verdict', VERDICT[kind]);
    this.find('.verdict').className = `verdict ${kind}`;
    for (const [who, p] of [['student', student], ['teacher', teacher]]) {
      write(`[data-p=${who}]`, probability(p));
      fill(this.find(`.row .${who}`), p);
    }
    write('[data-divergence]', nats(divergence));
    this.find('.dominance').hidden = !Array.isArray(dominant);
    if (Array.isArray(dominant)) {
      const [word, term, s, t] = dominant;
      // Of a divergence with negative terms, as those of a KL divergence are, a term is no share.
      const share = term !== null && divergence > 0 && term <= divergence;
      write('[data-dominant]', visible(word));
      write('.dominance span', nats(term) + ' nats' + (share ? `, ${Math.round(100 * term / divergence)}% of it` : ''));
      write('.dominance .quiet', `(student ${probability(s)}, teacher ${probability(t)})`);
    }
    const likely = Array.isArray(alternatives) ? alternatives : [];
    this.find('.card table').hidden = !likely.length;
    const cell = (who, p) => element('td', {},
      fill(element('span', {class: `meter ${who}`, 'aria-hidden': 'true'}, element('i')), p), probability(p));
    this.find('.card tbody').replaceChildren(...likely.map(([word, s, t]) =>
      element('tr', word === text ? {class: 'sampled'} : {},
        element('th', {scope: 'row'}, element('code', {}, visible(word))), cell('student', s), cell('teacher', t))));
  }
}

for (const figure of document.querySelectorAll('.chart')) charts.push(new Chart(figure));
const root = document.getElementById('token-view');
if (root) new TokenView(root);
