'use strict';
// Draws the charts and the token view from the JSON in the page. Text from a run only ever becomes text nodes.

const DATA = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

function element(tag, attributes = {}, ...children) {
  const drawn = ['svg', 'path', 'line', 'circle', 'rect', 'text', 'g'].includes(tag);
  const made = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const number = value => {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (size >= 1e5) return Math.round(value).toLocaleString('en');
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString('en', {maximumFractionDigits: 6});
};
const probability = p =>
  p === null || p === undefined ? '–' : p !== 0 && p < 0.001 ? p.toExponential(1) : p.toFixed(3);
const nats = d => (d === null || d === undefined ? '∞' : d !== 0 && d < 0.001 ? d.toExponential(1) : d.toFixed(3));

// ---- theme and section links

function setUpPage() {
  const root = document.documentElement;
  const button = document.getElementById('theme');
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const isDark = () => (root.dataset.theme ? root.dataset.theme === 'dark' : dark.matches);
  const label = () => { button.textContent = isDark() ? 'Light' : 'Dark'; };
  try { root.dataset.theme = localStorage.getItem('opsd-theme') || ''; } catch { /* not every file may store */ }
  button.addEventListener('click', () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    try { localStorage.setItem('opsd-theme', root.dataset.theme); } catch { /* the same */ }
    label();
  });
  dark.addEventListener('change', label);
  label();
  const links = document.getElementById('links');
  for (const section of document.querySelectorAll('main section')) {
    links.append(element('a', {href: '#' + section.id}, section.querySelector('h2').textContent));
  }
  for (const hidden of document.querySelectorAll('.js')) hidden.classList.remove('js');
}

// ---- charts

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) {
    found.push(Number((i * step).toPrecision(10)));
  }
  return found;
}

function tickLabel(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return (size !== 0 && size < 1e-3 ? value.toExponential() : String(value)).replaceAll('-', '−');
}

const lineClass = line => `r${line.run % 6} d${line.run % 5}${line.second ? ' second' : ''}`;

function keyOf(line) {
  const key = element('svg', {class: `key ${lineClass(line)}`, viewBox: '0 0 26 8', width: 26, height: 8});
  key.append(element('path', {d: 'M0 4H26'}));
  return key;
}

function nearest(points, step) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - points[low - 1][0] <= points[low][0] - step ? low - 1 : low;
}

const LABEL = 14;  // height of a label beside the plot

class Chart {
  // lines: {run, second, label, points: [[x, y], ...], errors: [[low, high], ...], names}
  // bands: {look, label, values: [y, low, high]}; bounds: the least and the largest value there can be
  constructor(figure, title, unit, lines, bands = [], bounds = null) {
    Object.assign(this, {figure, title, unit, lines, bands, bounds, cursor: null});
    this.plot = figure.querySelector('.plot');
    this.readout = figure.querySelector('.readout');
    this.steps = [...new Set(lines.flatMap(line => line.points.map(p => p[0])))].sort((a, b) => a - b);
    this.cells = lines.map(line => {
      const value = element('b', {});
      const many = DATA.runs.length > 1;
      const two = lines.some(other => other.second);
      const label = [many ? DATA.runs[line.run] : '', two || !many ? line.label : ''].filter(Boolean).join(' · ');
      const name = element('span', {class: 'name'}, label);
      this.readout.append(element('span', {class: 'cell'}, keyOf(line), name, value));
      return value;
    });
    this.readout.classList.toggle('many', lines.length > 1);
    this.at = element('span', {class: 'at'});
    this.readout.prepend(this.at);
    new ResizeObserver(() => {
      if (Math.abs(this.plot.clientWidth - (this.width || 0)) > 1) this.draw();
    }).observe(this.plot);
  }

  range() {
    const values = this.lines.flatMap(line => line.points.map(p => p[1])).filter(v => v !== null);
    for (const line of this.lines) for (const pair of line.errors || []) values.push(...pair.filter(v => v !== null));
    for (const band of this.bands) values.push(...band.values.filter(v => v !== null));
    let [low, high] = [Infinity, -Infinity];
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    this.log = Chart.log && low > 0 && !this.bands.length && !this.lines.some(line => line.errors);
    if (this.log) {
      const room = (Math.log10(high / low) || 0.2) * 0.06;
      return [Math.log10(low) - room, Math.log10(high) + room];
    }
    if (this.bounds) [low, high] = this.within(low, high);
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    const floor = low >= 0 && low < 0.35 * high ? 0 : low - room;
    return [floor, high + room];
  }

  // The range in which no interval takes more than a third of the plot: those of a few problems would fill it.
  within(low, high) {
    const [least, most] = this.bounds;
    const intervals = [...this.lines.flatMap(line => line.errors), ...this.bands.map(band => band.values.slice(1))];
    const widths = intervals.map(([under, over]) => (under === null || over === null ? 0 : over - under));
    const span = Math.min(most - least, widths.reduce((a, b) => Math.max(a, 3 * b), high - low));
    const start = Math.min(most - span, Math.max(least, (low + high - span) / 2));
    return [Math.min(low, start), Math.max(high, start + span)];
  }

  yTicks(low, high, count) {
    const top = this.bounds ? Math.min(high, this.bounds[1]) : high;
    if (!this.log) return ticks(low, top, count).map(v => [v, tickLabel(v)]);
    const marks = [];
    for (let e = Math.floor(low); e <= Math.ceil(high); e++) {
      for (const m of high - low > 2.5 ? [1] : [1, 2, 5]) {
        const at = e + Math.log10(m);
        if (at >= low && at <= high) marks.push([at, tickLabel(Number((m * 10 ** e).toPrecision(2)))]);
      }
    }
    return marks;
  }

  draw() {
    const width = this.width = this.plot.clientWidth;
    if (!width) return;
    const tall = this.figure.classList.contains('tall');
    const height = tall ? Math.min(320, Math.max(220, width * 0.4)) : 170;
    const box = {left: 46, right: width - (this.bands.length ? 60 : 10), top: 8, bottom: height - 24};
    const [low, high] = this.range();
    let [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    if (first === last) { first -= 1; last += 1; }
    const x = this.x = step => box.left + (step - first) / (last - first) * (box.right - box.left);
    const y = this.y = v => box.bottom - ((this.log ? Math.log10(v) : v) - low) / (high - low) * (box.bottom - box.top);
    const place = v => box.bottom - (v - low) / (high - low) * (box.bottom - box.top);

    const svg = element('svg', {
      viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: 'slider', 'aria-orientation': 'horizontal',
      'aria-label': `${this.title}${this.unit ? `, ${this.unit}` : ''}, by step`,
      'aria-valuemin': this.steps[0], 'aria-valuemax': this.steps[this.steps.length - 1],
    });
    for (const [v, label] of this.yTicks(low, high, tall ? 6 : 4)) {
      svg.append(element('line', {class: 'grid-line', x1: box.left, x2: box.right, y1: place(v), y2: place(v)}));
      svg.append(element('text', {class: 'tick', x: box.left - 8, y: place(v) + 3.5, 'text-anchor': 'end'}, label));
    }
    const whole = ticks(first, last, Math.max(2, Math.floor(width / 70))).filter(Number.isInteger);
    for (const step of whole.filter(s => s >= this.steps[0] && s <= this.steps[this.steps.length - 1])) {
      const anchor = x(step) > box.right - 12 ? 'end' : 'middle';
      svg.append(element('text', {class: 'tick', x: x(step), y: height - 7, 'text-anchor': anchor}, tickLabel(step)));
    }
    svg.append(element('line', {class: 'axis', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}));
    for (const band of this.bands) {
      const [value, under, over] = band.values;
      if (under !== null && over !== null) {
        svg.append(element('rect', {
          class: `band ${band.look}`, x: box.left, width: box.right - box.left, y: y(over),
          height: Math.max(1, y(under) - y(over)),
        }));
      }
      svg.append(element('line', {
        class: `reference ${band.look}`, x1: box.left, x2: box.right, y1: y(value), y2: y(value),
      }));
    }
    for (const line of this.lines) svg.append(this.path(line));
    // Beside the plot, where they hide no line, and pushed apart where they would hide each other.
    const labels = this.bands.map(band => ({text: band.label, at: y(band.values[0])})).sort((a, b) => a.at - b.at)
      .filter(({text, at}, i, all) => !all.slice(0, i).some(o => o.text === text && at - o.at < LABEL))
      .slice(0, Math.floor((box.bottom - box.top) / LABEL));
    labels.forEach((label, i) => { label.at = Math.max(label.at, i ? labels[i - 1].at + LABEL : box.top); });
    for (let i = labels.length - 1, most = box.bottom; i >= 0; most = labels[i--].at - LABEL) {
      labels[i].at = Math.min(labels[i].at, most);
    }
    for (const {text, at} of labels) svg.append(element('text', {class: 'note', x: box.right + 9, y: at + 3.5}, text));
    this.mark = element('line', {class: 'cursor', y1: box.top, y2: box.bottom});
    this.dots = this.lines.map(line => element('circle', {class: `dot ${lineClass(line)}`, r: 3.5}));
    svg.append(this.mark, ...this.dots);
    this.listen(svg, box, first, last);
    const focused = this.svg && document.activeElement === this.svg;
    this.plot.replaceChildren(svg);
    this.svg = svg;
    this.show(this.cursor);
    if (focused) svg.focus();
  }

  path(line) {
    const group = element('g', {class: lineClass(line)});
    let d = '';
    let open = false;
    line.points.forEach(([step, value], i) => {
      if (value === null) { open = false; return; }
      d += `${open ? 'L' : 'M'}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
      const next = line.points[i + 1];
      const alone = !open && (!next || next[1] === null);
      open = true;
      if (line.errors) {
        const [low, high] = line.errors[i];
        if (low !== null && high !== null) {
          const at = this.x(step) + (line.run - (DATA.runs.length - 1) / 2) * 3;  // several runs' bars side by side
          group.append(element('path', {class: 'error',
            d: `M${at} ${this.y(low)}V${this.y(high)}m-4 0h8M${at - 4} ${this.y(low)}h8`}));
        }
      }
      if (line.errors || alone) {
        group.append(element('circle', {class: 'point', cx: this.x(step), cy: this.y(value), r: line.errors ? 4 : 3}));
      }
    });
    group.prepend(element('path', {class: 'line', d}));
    return group;
  }

  listen(svg, box, first, last) {
    const point = event => {
      const at = svg.getBoundingClientRect();
      const scaled = (event.clientX - at.left) * this.width / at.width;
      const share = (scaled - box.left) / (box.right - box.left);
      const wanted = first + Math.min(1, Math.max(0, share)) * (last - first);
      Chart.showAll(this.steps[nearest(this.steps.map(s => [s]), wanted)]);
    };
    svg.addEventListener('pointermove', point);
    svg.addEventListener('pointerdown', point);
    svg.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') Chart.showAll(null); });
    svg.addEventListener('keydown', event => {
      const end = this.steps.length - 1;
      const here = this.cursor === null ? end : nearest(this.steps.map(s => [s]), this.cursor);
      const far = Math.max(1, Math.round(end / 10));
      const to = {
        ArrowLeft: here - 1, ArrowRight: here + 1, ArrowDown: here - 1, ArrowUp: here + 1,
        PageDown: here - far, PageUp: here + far, Home: 0, End: end, Escape: null,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      Chart.showAll(to === null ? null : this.steps[Math.min(end, Math.max(0, to))]);
    });
  }

  // The values at `step`, at the last one for null. Lines without a value near it say so.
  show(step) {
    this.cursor = step;
    const at = step === null ? this.steps[this.steps.length - 1] : step;
    const gap = Math.max(1, (this.steps[this.steps.length - 1] - this.steps[0]) / 100);
    const said = [];
    let label = `step ${number(at)}`;
    this.lines.forEach((line, i) => {
      const near = nearest(line.points, at);
      const [x, value] = line.points[near];
      const there = line.errors || Math.abs(x - at) <= gap;
      const [low, high] = line.errors ? line.errors[near] : [null, null];
      const errors = low !== null && high !== null ? ` (${low.toFixed(1)} to ${high.toFixed(1)})` : '';
      const shown = line.errors && value !== null ? value.toFixed(1) : number(value);
      this.cells[i].textContent = there ? shown + errors : '–';
      if (line.errors && DATA.accuracy.length === 1) label = line.names[near];
      said.push(`${DATA.runs.length > 1 ? `${DATA.runs[line.run]} ` : ''}${line.label} ${this.cells[i].textContent}`);
      if (this.dots) {
        const visible = step !== null && there && value !== null;
        this.dots[i].style.display = visible ? '' : 'none';
        if (visible) { this.dots[i].setAttribute('cx', this.x(x)); this.dots[i].setAttribute('cy', this.y(value)); }
      }
    });
    this.at.textContent = label;
    if (!this.svg) return;
    this.mark.style.display = step === null ? 'none' : '';
    if (step !== null) { this.mark.setAttribute('x1', this.x(step)); this.mark.setAttribute('x2', this.x(step)); }
    this.svg.setAttribute('aria-valuenow', at);
    this.svg.setAttribute('aria-valuetext', `${label}: ${said.join(', ')}`);
  }

  static showAll(step) { for (const chart of Chart.all) chart.show(step); }
}
Chart.log = false;
Chart.all = [];

function setUpCharts() {
  const accuracy = document.querySelector('[data-accuracy]');
  if (accuracy) {
    const lines = DATA.accuracy.filter(run => run.points.length).map(({run, points}) => ({
      run, second: false, label: 'accuracy',
      points: points.map(p => [p.step, p.values[0]]),
      errors: points.map(p => [p.values[1], p.values[2]]),
      names: points.map(p => ({base: 'base model', trained: `trained, step ${p.step}`}[p.name] || p.name)),
    }));
    const bands = [];
    const add = (run, label, values) => {  // runs often share their teacher and their base, which then are no run's own
      const same = bands.find(band => band.label === label && band.values.every((v, i) => v === values[i]));
      if (same) same.look = 'shared'; else bands.push({look: `r${run % 6}`, label, values});
    };
    for (const {run, points, teacher} of DATA.accuracy) {
      const base = points.find(p => p.name === 'base');
      if (teacher) add(run, 'teacher', teacher.values);
      if (base && points.length > 1) add(run, 'base', [base.values[0], null, null]);
    }
    if (lines.length) Chart.all.push(new Chart(accuracy, 'Accuracy', '%', lines, bands, [0, 100]));
    else accuracy.remove();
  }
  for (const figure of document.querySelectorAll('[data-chart]')) {
    const {title, unit, lines} = DATA.charts[figure.dataset.chart];
    Chart.all.push(new Chart(figure, title, unit, lines));
  }
  document.getElementById('log').addEventListener('change', event => {
    Chart.log = event.target.checked;
    for (const chart of Chart.all) chart.draw();
  });
}

// ---- token view

const STRONG = 0.5;  // nats at which the colour is full
const NOTABLE = 0.05;  // nats from which it is a disagreement
const LINE = 60;  // characters, about, in a line of the text beside the card
const FEW_LINES = 8;  // up to which the card lies below the text: beside so few, it would leave a hole under them
const strength = d => (d === null || d === undefined ? 1 : Math.sqrt(Math.min(1, Math.max(0, d) / STRONG)));
const visible = text => text.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/ /g, '␣') || '(no text of its own)';

// Whether the teacher gives the token less or more than the student; within 5 % of each other it is neither.
function leaning(student, teacher) {
  if (student === null || teacher === null) return 'same';
  const ratio = Math.log((teacher + 1e-12) / (student + 1e-12));
  return ratio < -0.05 ? 'less' : ratio > 0.05 ? 'more' : 'same';
}
const VERDICT = {less: 'The teacher likes it less', more: 'The teacher likes it more', same: 'Both like it alike'};

class TokenView {
  constructor(root) {
    this.root = root;
    this.runs = [...new Set(DATA.samples.map(sample => sample.run))];
    this.pick = element('select', {id: 'pick-sample'});
    const names = this.runs.map(run => element('option', {value: run}, DATA.runs[run]));
    this.pickRun = element('select', {id: 'pick-run'}, ...names);
    const button = (text, label, action) => {
      const made = element('button', {type: 'button', 'aria-label': label, title: label}, text);
      made.addEventListener('click', action);
      return made;
    };
    const controls = element('div', {class: 'tools'});
    if (this.runs.length > 1) controls.append(element('label', {for: 'pick-run'}, 'Run ', this.pickRun));
    controls.append(
      element('label', {for: 'pick-sample'}, 'Rollout ', this.pick),
      element('span', {class: 'group'},
        button('←', 'Previous rollout', () => this.turn(-1)), button('→', 'Next rollout', () => this.turn(1))),
      button('Next disagreement', `Next token with a divergence of ${NOTABLE} nats or more`, () => this.disagreement()),
    );
    this.about = element('div', {class: 'about'});
    this.strip = element('div', {class: 'strip', 'aria-hidden': 'true'});
    this.text = element('div', {
      class: 'tokens', role: 'listbox', 'aria-label': 'Tokens of the rollout', 'aria-orientation': 'horizontal',
    });
    this.card = element('aside', {class: 'card', 'aria-label': 'The chosen token'});
    const legend = element('div', {class: 'scale'},
      element('span', {class: 'tok less', style: '--a:.9'}, 'teacher: less'),
      element('span', {class: 'ramp less', 'aria-hidden': 'true'}), element('span', {class: 'zero'}, 'agree'),
      element('span', {class: 'ramp more', 'aria-hidden': 'true'}),
      element('span', {class: 'tok more', style: '--a:.9'}, 'teacher: more'),
      element('span', {class: 'tok same', style: '--a:.9'}, 'alike, but they differ elsewhere'),
      element('span', {class: 'quiet'}, `full colour: divergence of ${STRONG} nats or more`));
    this.legend = legend;
    const reading = element('div', {class: 'reading'}, this.about, legend, this.strip, this.text);
    this.split = element('div', {class: 'split'}, reading, this.card);
    root.append(controls, this.split);
    this.pickRun.addEventListener('change', () => this.fill());
    this.pick.addEventListener('change', () => this.open(DATA.samples[this.pick.value]));
    this.text.addEventListener('pointerover', event => {
      const token = event.target.closest('.tok');
      if (token) this.show(Number(token.dataset.i));
    });
    this.text.addEventListener('pointerleave', () => { if (this.chosen !== null) this.show(this.chosen); });
    this.text.addEventListener('focusin', event => {
      const token = event.target.closest('.tok');
      if (token) this.choose(Number(token.dataset.i), false);
    });
    this.text.addEventListener('keydown', event => this.key(event));
    this.text.addEventListener('click', event => {
      const token = event.target.closest('.tok');
      if (token) this.choose(Number(token.dataset.i), true);
    });
    this.fill();
  }

  fill() {
    const run = Number(this.pickRun.value);
    const own = DATA.samples.map((sample, i) => [sample, i]).filter(([sample]) => sample.run === run);
    const groups = new Map();
    for (const [sample, i] of own) {
      if (!groups.has(sample.step)) groups.set(sample.step, []);
      groups.get(sample.step).push([sample, i]);
    }
    this.pick.replaceChildren();
    for (const [step, members] of groups) {
      const group = element('optgroup', {label: `step ${step ?? '?'}`});
      for (const [sample, i] of members) {
        const problem = sample.problem.replace(/\s+/g, ' ').slice(0, 48);
        group.append(element('option', {value: i}, `step ${step ?? '?'} · ${problem}`));
      }
      this.pick.append(group);
    }
    const first = own.find(([sample]) => sample.view.length) || own[0];
    this.pick.value = first[1];
    this.open(first[0]);
  }

  turn(by) {
    const options = this.pick.options;
    this.pick.selectedIndex = (this.pick.selectedIndex + by + options.length) % options.length;
    this.open(DATA.samples[this.pick.value]);
  }

  open(sample) {
    this.sample = sample;
    this.chosen = this.shown = null;
    const facts = [`step ${sample.step ?? '?'}`];
    if (sample.tokens !== null) facts.push(`${number(sample.tokens)} tokens`);
    if (sample.of > sample.view.length) facts.push(`the first ${number(sample.view.length)} shown`);
    facts.push(sample.truncated ? 'cut off at the longest length' : 'ended by itself');
    if (sample.source) facts.push(sample.source);
    this.about.replaceChildren(
      element('p', {class: 'quiet'}, facts.join(' · ')),
      element('p', {class: 'problem', tabindex: 0, role: 'region', 'aria-label': 'Problem'}, sample.problem));
    const known = sample.view.length > 0;
    this.legend.hidden = this.card.hidden = this.strip.hidden = !known;
    this.text.classList.toggle('plain', !known);
    const written = known ? sample.view.map(token => token[0] ?? '').join('') : sample.rollout;
    const lines = written.split('\n').reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / LINE)), 0);
    this.split.classList.toggle('wide', !known || lines <= FEW_LINES);
    this.text.setAttribute('role', known ? 'listbox' : 'group');
    this.tokens = sample.view.map((token, i) => this.span(token, i));
    this.text.replaceChildren(...(known ? this.tokens : [sample.rollout]));
    this.text.scrollTop = 0;
    if (!known) return;
    this.drawStrip();
    this.choose(Math.max(0, sample.view.findIndex(token => (token[4] ?? Infinity) >= NOTABLE)), false);
  }

  span([text, , student, teacher, divergence], i) {
    const kind = leaning(student, teacher);
    const both = `student ${probability(student)}, teacher ${probability(teacher)}`;
    const label = `${visible(text ?? '')}: ${both}, divergence ${nats(divergence)} nats. ${VERDICT[kind]}.`;
    const span = element('span', {
      class: `tok ${kind}${text === '' ? ' empty' : ''}`, 'data-i': i, tabindex: -1, role: 'option',
      'aria-selected': 'false', 'aria-label': label,
    });
    // A line break shows as a sign and then breaks the line.
    span.append(text === '' ? '·' : (text ?? '').replace(/\n/g, '↵\n'));
    span.style.setProperty('--a', strength(divergence).toFixed(3));
    return span;
  }

  drawStrip() {
    const view = this.sample.view;
    const count = Math.min(view.length, 240);
    const bars = [];
    for (let bar = 0; bar < count; bar++) {
      const [from, to] = [Math.floor(bar * view.length / count), Math.floor((bar + 1) * view.length / count)];
      let most = from;
      for (let i = from; i < to; i++) if ((view[i][4] ?? Infinity) > (view[most][4] ?? Infinity)) most = i;
      const made = element('span', {class: leaning(view[most][2], view[most][3])});
      made.style.height = `${Math.max(4, 100 * strength(view[most][4]))}%`;
      made.addEventListener('click', () => this.choose(most, true));
      made.addEventListener('pointerenter', () => this.show(most));
      bars.push(made);
    }
    this.strip.replaceChildren(...bars);
  }

  choose(i, focus) {
    if (this.chosen !== null) {
      this.tokens[this.chosen].tabIndex = -1;
      this.tokens[this.chosen].setAttribute('aria-selected', 'false');
    }
    this.chosen = i;
    this.tokens[i].tabIndex = 0;
    this.tokens[i].setAttribute('aria-selected', 'true');
    if (focus) {
      this.tokens[i].focus({preventScroll: true});
      this.tokens[i].scrollIntoView({block: 'nearest'});
    }
    this.show(i);
  }

  disagreement() {
    const view = this.sample.view;
    for (let ahead = 1; ahead <= view.length; ahead++) {
      const i = (this.chosen + ahead) % view.length;
      if ((view[i][4] ?? Infinity) >= NOTABLE) { this.choose(i, true); return; }
    }
  }

  key(event) {
    if (this.chosen === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const end = this.tokens.length - 1;
    const to = {ArrowRight: this.chosen + 1, ArrowLeft: this.chosen - 1, Home: 0, End: end,
      ArrowDown: this.line(1), ArrowUp: this.line(-1)}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(Math.min(end, Math.max(0, to)), true);
  }

  // The token above or below the chosen one.
  line(direction) {
    const here = this.tokens[this.chosen].getBoundingClientRect();
    const centre = here.left + here.width / 2;
    let [best, row, distance] = [this.chosen, null, Infinity];
    for (let i = this.chosen + direction; i >= 0 && i < this.tokens.length; i += direction) {
      const box = this.tokens[i].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < 4) continue;
      if (row === null) row = box.top;
      if (Math.abs(box.top - row) > 4) break;
      const off = Math.abs(box.left + box.width / 2 - centre);
      if (off < distance) [best, distance] = [i, off];
    }
    return best;
  }

  show(i) {
    if (this.shown === i && this.tokens[i].classList.contains('shown')) return;
    if (this.shown !== null) this.tokens[this.shown].classList.remove('shown');
    this.shown = i;
    this.tokens[i].classList.add('shown');
    const [text, id, student, teacher, divergence, alternatives, dominant] = this.sample.view[i];
    const kind = leaning(student, teacher);
    const bar = (who, p) => element('div', {class: `row ${who}`}, element('span', {class: 'who'}, who),
      meter(who, p), element('b', {'data-p': who}, probability(p)));
    const facts = element('div', {},
      element('p', {class: 'place'},
        `token ${i + 1} of ${number(this.sample.of)}`, element('span', {}, `id ${id ?? '?'}`)),
      element('p', {class: 'word'}, visible(text ?? '')),
      element('p', {class: `verdict ${kind}`}, VERDICT[kind]),
      bar('student', student), bar('teacher', teacher),
      element('p', {class: 'fact'}, 'Divergence ', element('b', {'data-divergence': ''}, nats(divergence)), ' nats'),
    );
    if (Array.isArray(dominant)) {
      const [word, term, s, t] = dominant;
      // Of a divergence with negative terms, as those of a KL divergence are, a term is no share.
      const isShare = term !== null && divergence > 0 && term <= divergence;
      const share = isShare ? `, ${Math.round(100 * term / divergence)}% of it` : '';
      facts.append(element('p', {class: 'fact'},
        'Most of it from ', element('code', {'data-dominant': ''}, visible(word ?? '')), `: ${nats(term)} nats${share}`,
        element('span', {class: 'quiet'}, ` (student ${probability(s)}, teacher ${probability(t)})`)));
    }
    const parts = [facts];
    if (Array.isArray(alternatives) && alternatives.length) {
      const body = element('tbody', {});
      for (const [word, s, t] of alternatives) {
        body.append(element('tr', word === text ? {class: 'sampled'} : {},
          element('th', {scope: 'row'}, element('code', {}, visible(word ?? ''))),
          element('td', {}, meter('student', s), element('span', {}, probability(s))),
          element('td', {}, meter('teacher', t), element('span', {}, probability(t)))));
      }
      const head = ['Likeliest', 'student', 'teacher'].map(title => element('th', {scope: 'col'}, title));
      parts.push(element('table', {}, element('thead', {}, element('tr', {}, ...head)), body));
    }
    this.card.replaceChildren(...parts);
  }
}

function meter(who, p) {
  const fill = element('i', {});
  fill.style.width = `${100 * Math.min(1, Math.max(0, p ?? 0))}%`;
  return element('span', {class: `meter ${who}`, 'aria-hidden': 'true'}, fill);
}

setUpPage();
setUpCharts();
const root = document.getElementById('token-view');
if (root) new TokenView(root);
