// A grid of which one cell is selected: by a click, or with the arrow keys, Home and End while it has the focus.

class Grid {
  /** `rows` are lists of cells; the cell that is selected is the grid's only stop for the Tab key. */
  constructor(rows, select) {
    this.rows = rows;
    this.select = select;
    rows.forEach((cells, row) => cells.forEach((cell, column) => {
      cell.setAttribute("role", "gridcell");
      cell.tabIndex = -1;
      cell.addEventListener("click", () => this.go(row, column));
      cell.addEventListener("keydown", (event) => this.onKey(event, row, column));
    }));
    rows[0][0].tabIndex = 0;
  }

  /** Shows which cell is selected; null for none. */
  mark(row, column) {
    for (const cell of this.rows.flat()) {
      if (cell.getAttribute("aria-selected") === "true") cell.setAttribute("aria-selected", "false");
    }
    if (row === null) return;
    for (const cell of this.rows.flat()) if (cell.tabIndex === 0) cell.tabIndex = -1;
    this.rows[row][column].setAttribute("aria-selected", "true");
    this.rows[row][column].tabIndex = 0;
  }

  go(row, column) {
    this.select(row, column);
    this.rows[row][column].focus({preventScroll: false});
  }

  onKey(event, row, column) {
    const columns = this.rows[row].length;
    const target = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, columns - 1], Enter: [row, column], " ": [row, column],
    }[event.key];
    if (!target || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (this.rows[target[0]]?.[target[1]]) this.go(...target);
  }
}
