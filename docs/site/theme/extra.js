// The copy button of every block of code stands in a landmark of its own; each gets a name, so that they can be told apart.
new MutationObserver(() => {
  document.querySelectorAll("nav.md-code__nav:not([aria-label])").forEach((nav) => {
    nav.setAttribute("aria-label", "Code " + (document.querySelectorAll("nav.md-code__nav[aria-label]").length + 1));
  });
}).observe(document.documentElement, { childList: true, subtree: true });
