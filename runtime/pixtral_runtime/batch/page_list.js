// A long list of which only the rows in and near the window are in the document.

const NEAR_PX = 700;

// Rows differ in height. Those that have not been seen are estimated; what is in view stays where it is when a row
// turns out to be another height. Items are numbers from 0 to `count`.
class LongList {
  constructor(element, count, {make, estimate, leave}) {
    Object.assign(this, {element, make, estimate, leave});
    this.items = [];
    this.rows = new Map();
    this.heights = new Float64Array(count);
    this.width = 0;
    this.asked = false;
    this.sizes = new ResizeObserver(() => this.drawSoon());
    addEventListener("scroll", () => this.draw(), {passive: true});
    addEventListener("resize", () => this.drawSoon());
  }

  get end() {
    return this.offsets[this.items.length];
  }

  // Show these items, in this order, from the first one on.
  show(items) {
    this.items = items;
    this.sum();
    const top = this.element.getBoundingClientRect().top - this.covered();
    if (top < 0) scrollBy(0, top);
    this.draw();
  }

  // Make an item's row anew.
  refresh(item) {
    const row = this.rows.get(item);
    if (!row) return;
    this.sizes.unobserve(row);
    this.rows.set(item, this.make(item));
    row.replaceWith(this.rows.get(item));
    this.sizes.observe(this.rows.get(item));
    this.draw();
  }

  // Bring a place of the list into view, and give its row.
  reveal(place) {
    for (let tries = 0; tries < 6; tries++) {
      const top = this.element.getBoundingClientRect().top + this.offsets[place], high = this.covered();
      const height = this.heights[this.items[place]];
      const below = Math.min(top - high, top + height - innerHeight);
      const move = top < high ? top - high : below > 0 ? below : 0;
      if (tries && Math.abs(move) < 1) break;
      scrollBy(0, move);
      this.draw();
    }
    return this.rows.get(this.items[place]);
  }

  // The first place of the list that is in view.
  firstInView() {
    return this.find(this.scrolled() + this.covered() + 1);
  }

  // Pixels of the list that are above the window.
  scrolled() {
    return -this.element.getBoundingClientRect().top;
  }

  // Pixels at the top of the window that what sticks there covers.
  covered() {
    return this.element.previousElementSibling.offsetHeight;
  }

  find(y) {
    let low = 0, high = this.items.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.offsets[middle] <= y) low = middle; else high = middle - 1;
    }
    return low;
  }

  sum() {
    this.offsets = new Float64Array(this.items.length + 1);
    this.items.forEach((item, place) => { this.offsets[place + 1] = this.offsets[place] + this.heights[item]; });
  }

  drawSoon() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this.draw(); });
  }

  draw() {
    const was = this.scrolled();
    const isAtEnd = scrollY > 0 && scrollY + innerHeight >= document.documentElement.scrollHeight - 1;
    const behind = this.end - was;
    const place = this.find(was), within = was - this.offsets[place];
    let y = was;
    if (this.element.clientWidth !== this.width) {
      this.width = this.element.clientWidth;
      this.heights.forEach((_, item) => { this.heights[item] = this.estimate(item, this.width); });
      this.sum();
    }
    for (let tries = 0; tries < 8; tries++) {
      this.place(this.find(y - NEAR_PX), Math.min(this.items.length, this.find(y + innerHeight + NEAR_PX) + 1));
      const isSettled = !this.measure();
      y = isAtEnd ? this.end - behind : this.offsets[place] + within;
      if (isSettled) break;
    }
    this.fill();
    const move = y - this.scrolled();
    if (Math.abs(move) >= 1) scrollBy(0, move);
  }

  place(first, last) {
    Object.assign(this, {first, last});
    const wanted = this.items.slice(first, last), kept = new Set(wanted);
    for (const [item, row] of this.rows) {
      if (kept.has(item)) continue;
      this.leave(item);
      this.sizes.unobserve(row);
      this.rows.delete(item);
      row.remove();
    }
    let next = this.element.firstElementChild;
    wanted.forEach((item, at) => {
      const isNew = !this.rows.has(item);
      if (isNew) this.rows.set(item, this.make(item));
      const row = this.rows.get(item);
      row.ariaPosInSet = first + at + 1;
      row.ariaSetSize = this.items.length;
      if (row === next) next = next.nextElementSibling; else this.element.insertBefore(row, next);
      if (isNew) this.sizes.observe(row);
    });
    this.fill();
  }

  // Room for the rows that are not in the document.
  fill() {
    this.element.style.paddingTop = `${this.offsets[this.first]}px`;
    this.element.style.paddingBottom = `${this.end - this.offsets[this.last]}px`;
  }

  // Whether a row is of another height than was thought.
  measure() {
    let isChanged = false;
    for (const [item, row] of this.rows) {
      const height = row.getBoundingClientRect().height;
      if (Math.abs(height - this.heights[item]) < 0.01) continue;
      this.heights[item] = height;
      isChanged = true;
    }
    if (isChanged) this.sum();
    return isChanged;
  }
}
