/* Formulas are typeset with the KaTeX that lies beside this file; nothing is loaded from elsewhere. */
for (const formula of document.querySelectorAll(".arithmatex")) {
  const text = formula.textContent.trim()
  katex.render(text.slice(2, -2), formula, { displayMode: text.startsWith("\\[") })
}
