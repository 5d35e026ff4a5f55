const area = element.querySelector(".area"), input = element.querySelector("input"), most = 1048576;
const take = async (file) => {
  if (!file) return;
  const text = file.size > most ? null : await file.text();
  trigger("submit", {name: file.name, text, size: file.size});
  input.value = "";
};
input.addEventListener("change", () => take(input.files[0]));
area.addEventListener("dragover", (event) => { event.preventDefault(); area.classList.add("over"); });
area.addEventListener("dragleave", () => area.classList.remove("over"));
area.addEventListener("drop", (event) => {
  event.preventDefault();
  area.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
